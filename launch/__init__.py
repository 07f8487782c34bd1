"""`ctllm launch TARGET -- VERB ...`: a verb as a job of one or several processes, started again when one is lost."""
