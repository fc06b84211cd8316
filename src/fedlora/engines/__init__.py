"""How clients are played: the one local loop, and who runs it when."""
