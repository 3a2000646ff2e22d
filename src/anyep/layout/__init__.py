"""Step 1, who goes where: pure functions of integers, without device, group or clock."""
