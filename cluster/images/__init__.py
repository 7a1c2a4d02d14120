"""Container files of the images that run Danlu on CPU and on GPU machines."""
