"""The operator's page: a Bokeh server in a process of its own, a subscriber like any other."""
