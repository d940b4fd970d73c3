"""Images: data sets opened and divided, batches made of them, folders checked and prepared."""
