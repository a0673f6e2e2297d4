"""What stops the damage: echo rows, the plan that says which and how many, and held rows."""
