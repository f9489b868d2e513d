"""What nibblecast costs: ratios against peers, measured in one run (`make bench`)."""
