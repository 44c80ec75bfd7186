"""What the exit codes of both commands mean."""

# Everything that was asked for is there.
OK = 0
# Some inputs were refused or failed (or: problems were found); the rest is there.
PARTIAL = 1
# The command could not be followed; nothing was written.
MISUSE = 2
# The run could not go on (no space, no workers); what was done is kept.
STOPPED = 3
# Ctrl-C or SIGTERM; what was done is kept.
INTERRUPTED = 130
