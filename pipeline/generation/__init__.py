"""Images from a trained model: the generator, sampled images as an artifact, editing, .npz files."""
