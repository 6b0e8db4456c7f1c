"""From the tensors of a checkpoint to a model that runs from them."""
