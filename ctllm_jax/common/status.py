"""Exit statuses of `ctllm` that other programs act on: schedulers, `ctllm launch`."""

EXIT_MISTAKE = 2  # the user's to mend: starting again changes nothing
EXIT_LOST = 69  # another process of the job is gone, or none moves any more: start all of them again
EXIT_RESUME = 75  # stopped on request after saving: start the same command again
