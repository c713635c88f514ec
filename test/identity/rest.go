package main

import (
	"context"
	"errors"
)

func todo(_ context.Context, tell tell) { tell("written", "", errors.New("not yet")) }

var kubernetesSuite = todo

func beInside([]string) int { return 2 }
