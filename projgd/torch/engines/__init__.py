"""Apply the constraint of a job to parameters; `projgd.torch.routing` chooses among the engines."""
