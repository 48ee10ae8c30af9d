"""What runs in the engines' own processes for their own FedAvg; the files are copied, and import nothing of shoal."""
