"""Pure functions of tensors: factors, costs, updates, selections and scores."""
