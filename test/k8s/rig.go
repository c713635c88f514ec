package main

import (
	"context"
	"errors"
	"path/filepath"

	"github.com/twmb/franz-go/pkg/kgo"

	"klamm/test/kafka"
	"klamm/test/kubernetes"
)

// attackImage has busybox, nft and a program that makes packets of its own.
const attackImage = "klamm.test/attack:1"

// images makes what the attacks need.
func images(ctx context.Context) func(dir string) ([]*kubernetes.Image, error) {
	return func(dir string) ([]*kubernetes.Image, error) {
		program := filepath.Join(dir, "attack")
		if err := kubernetes.Build(ctx, "test/k8s/attack", program); err != nil {
			return nil, err
		}
		attack, err := kubernetes.ShellImage(attackImage, "nft")
		if err != nil {
			return nil, err
		}
		attack.Files["bin/attack"] = program
		return []*kubernetes.Image{attack}, nil
	}
}

// rig is a node, a broker on another host, and what is between them.
type rig struct {
	node    *kubernetes.Node
	cluster *kafka.Cluster
	admin   *kgo.Client
	wire    *wire
	around  int   // packets of pods at the broker before klamm had all
	missing error // why there is no klamm
}

func newRig(ctx context.Context, dir, cgroup string) (_ *rig, err error) {
	r := &rig{}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.close())
		}
	}()
	if r.node, err = kubernetes.New(dir, cgroup); err != nil {
		return nil, err
	}
	if r.wire, err = listenOnWire(kubernetes.BrokerEnd); err != nil {
		return nil, err
	}
	broker := make(chan error, 1)
	go func() { broker <- r.startBroker(ctx) }()
	return r, errors.Join(r.node.Run(ctx), <-broker)
}

// close ends what would not end with this program. The node is killed from outside.
func (r *rig) close() error {
	var failures []error
	if r.admin != nil {
		r.admin.Close()
	}
	if r.cluster != nil {
		failures = append(failures, r.cluster.Stop())
	}
	return errors.Join(failures...)
}
