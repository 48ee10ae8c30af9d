"""shoal over Flower: the apps that a SuperLink and its SuperNodes run."""
