package main

// failsDirect are tests that fail without the node too, by setting, and why, as far as known.
var failsDirect = map[string]map[string]string{}
