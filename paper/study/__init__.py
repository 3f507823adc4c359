"""Where active convolutions pay: one narrow or wide network, trained in many ways on the same batches."""
