"""What keeps the results true: reproducing cells, comparing them with their records, and how long that takes."""

# Exit code and last line of a command that Ctrl-C has ended.
INTERRUPTED = 130
STOPPED = "stopped; what is finished is kept, and the same command goes on from there"
DEVICE_VARIABLE = "TFMQ_BENCH_DEVICE"
