"""Program that hands lines from its standard input to trackio: first the run, then its numbers.

`pal.train.tracking` starts it. It imports nothing of `pal`, so that it starts without torch.
"""

import json
import signal
import sys


def main() -> None:
    """Log until the input ends, as it does with the training process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training process, which ends the input
    import trackio

    begin = json.loads(sys.stdin.readline())
    try:
        earlier = [run for run in trackio.Api().runs(begin["project"]) if run.name == begin["name"]]
    except ValueError:  # no such project yet
        earlier = []
    for run in earlier:
        run.delete()
    trackio.init(**begin, resume="never", embed=False, auto_log_gpu=False, auto_log_cpu=False)
    for line in sys.stdin:
        trackio.log(**json.loads(line))
    trackio.finish()


if __name__ == "__main__":
    main()
