"""How good a network, a graph or an engine is: labelled datasets, the confusion matrix, one way of judging."""
