"""What processes of one machine need of each other: to be started and ended, to talk, and to hand each other arrays."""
