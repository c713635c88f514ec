package main

import (
	"context"
	"errors"
)

func todo(_ context.Context, tell tell) { tell("written", "", errors.New("not yet")) }

var rotation, processes, tokens, tlsClients, credentials, kubernetesSuite = todo, todo, todo, todo, todo, todo

func beClient([]string) int { return 2 }
func beInside([]string) int { return 2 }
