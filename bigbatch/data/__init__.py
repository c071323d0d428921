"""The path of the images from a data set to a microbatch on the devices."""
