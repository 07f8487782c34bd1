"""`ctllm plan`: what a training config takes on a slice, by arithmetic and by compiling for devices not at hand."""
