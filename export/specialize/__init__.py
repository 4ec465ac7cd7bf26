"""What is known of a step, folded into constants: graphs of one step, and what leaves the loop."""
