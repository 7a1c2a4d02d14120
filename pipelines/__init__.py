"""The face of Danlu: recipe, planner, runner, report and the `danlu` command."""
