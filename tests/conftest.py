"""Some tests press Ctrl-C, and a shell that runs the tests in the background starts them with it ignored."""

import signal

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
