"""Where Danlu runs: connecting to Ray, submitting jobs, object-store access. Imports none of the other rooms."""
