"""Many models: found, converted in workers, each on its own, and reported one by one."""
