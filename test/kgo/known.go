package main

// failsDirect are tests that fail without the node too, by kind of broker, and why, as far as known.
var failsDirect = map[string]map[string]string{}
