"""What runs in a worker: one engine for all its tasks, processes beside it, and the detection of hangs."""
