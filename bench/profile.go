package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/pprof"
	"syscall"

	"github.com/rs/zerolog"

	"klamm/node"
)

// runNode is klamm node under the profiler: the CPU time from start to SIGTERM, and the allocations.
func runNode(args []string) (err error) {
	if len(args) != 2 {
		return errors.New("usage: node klamm.yaml directory")
	}
	config, err := node.Load(args[0])
	if err != nil {
		return err
	}
	n, err := node.Open(config, zerolog.Nop())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, n.Close()) }()
	cpu, err := os.Create(filepath.Join(args[1], "cpu.pprof"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, cpu.Close()) }()
	if err := pprof.StartCPUProfile(cpu); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	err = n.Run(ctx, func() {})
	pprof.StopCPUProfile()
	return errors.Join(err, writeAllocs(filepath.Join(args[1], "allocs.pprof")))
}

func writeAllocs(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return fmt.Errorf("write the profile: %w", err)
	}
	return errors.Join(pprof.Lookup("allocs").WriteTo(f, 0), f.Close())
}
