"""What this machine is and can do, each line with the command that mends it. Changes nothing."""
