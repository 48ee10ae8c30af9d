"""shoal over NVFlare: the controller and the executor of a job."""
