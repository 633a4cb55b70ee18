"""What a run needs before it is started: parameters, memory on each GPU, steps, time."""
