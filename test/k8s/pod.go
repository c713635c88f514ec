package main

import (
	"context"
	"fmt"
	"net/http"
	"strings"
)

const namespace = "shop" // of all pods

// pod is one that a check makes.
type pod struct {
	name    string
	image   string // "": clientImage
	command string // run by its shell
	restart string // restartPolicy; "": Never
	root    bool   // with NET_ADMIN and NET_RAW, and loopback addresses that may be routed

	hostNetwork bool // in the network namespace of the node
}

func (p pod) manifest() string {
	security, container := "{}", "{capabilities: {drop: [ALL]}}"
	if p.root {
		security = `{sysctls: [{name: net.ipv4.conf.all.route_localnet, value: "1"}]}`
		container = "{capabilities: {add: [NET_ADMIN, NET_RAW]}}"
	}
	image, restart := clientImage, "Never"
	if p.image != "" {
		image = p.image
	}
	if p.restart != "" {
		restart = p.restart
	}
	return fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: %q, namespace: %s}
spec:
  restartPolicy: %s
  terminationGracePeriodSeconds: 1
  automountServiceAccountToken: false
  enableServiceLinks: false
  hostNetwork: %t
  securityContext: %s
  containers:
  - {name: main, image: %q, imagePullPolicy: Never, command: [/bin/sh, -c, %q], securityContext: %s}
`, p.name, namespace, restart, p.hostNetwork, security, image, p.command, container)
}

// podState is what the checks read of a pod, as the API server tells it.
type podState struct {
	Metadata struct {
		Name string `json:"name"`
		UID  string `json:"uid"`
	} `json:"metadata"`
	Status struct {
		Phase             string `json:"phase"`
		PodIP             string `json:"podIP"`
		ContainerStatuses []struct {
			ContainerID  string `json:"containerID"` // containerd://ID
			RestartCount int    `json:"restartCount"`
			State        struct {
				Running    *struct{} `json:"running"`
				Terminated *struct {
					ExitCode int `json:"exitCode"`
				} `json:"terminated"`
			} `json:"state"`
		} `json:"containerStatuses"`
	} `json:"status"`
}

func (s *podState) containerID() string {
	if len(s.Status.ContainerStatuses) == 0 {
		return ""
	}
	return strings.TrimPrefix(s.Status.ContainerStatuses[0].ContainerID, "containerd://")
}

func (s *podState) running() bool {
	return len(s.Status.ContainerStatuses) > 0 && s.Status.ContainerStatuses[0].State.Running != nil
}

// ended also tells the exit code of its container.
func (s *podState) ended() (code int, ended bool) {
	if s.Status.Phase != "Succeeded" && s.Status.Phase != "Failed" || len(s.Status.ContainerStatuses) == 0 {
		return 0, false
	}
	if t := s.Status.ContainerStatuses[0].State.Terminated; t != nil {
		return t.ExitCode, true
	}
	return 0, false
}

const pods = "/api/v1/namespaces/" + namespace + "/pods"

func (a *api) start(ctx context.Context, p pod) error {
	_, err := a.call(ctx, http.MethodPost, pods, p.manifest())
	return err
}

func (a *api) state(ctx context.Context, name string) (*podState, error) {
	var s podState
	return &s, a.get(ctx, pods+"/"+name, &s)
}

// awaitPod waits until a pod is as wanted.
func (a *api) awaitPod(ctx context.Context, name, what string, wanted func(*podState) bool) (*podState, error) {
	var s *podState
	err := await(ctx, name+" "+what, func() (_ bool, err error) {
		if s, err = a.state(ctx, name); err != nil {
			return false, err
		}
		return wanted(s), nil
	})
	return s, err
}

func (a *api) log(ctx context.Context, name string) (string, error) {
	text, err := a.call(ctx, http.MethodGet, pods+"/"+name+"/log", "")
	return string(text), err
}

// remove deletes a pod and waits until it is gone, from the node too.
func (a *api) remove(ctx context.Context, name string) error {
	if _, err := a.call(ctx, http.MethodDelete, pods+"/"+name, ""); err != nil {
		return err
	}
	return await(ctx, "the end of "+name, func() (bool, error) {
		_, err := a.state(ctx, name)
		if is(err, http.StatusNotFound) {
			return true, nil
		}
		return false, err
	})
}

// outcome is how a pod that runs to its end ended.
type outcome struct {
	*podState
	code int
	log  string
}

// run runs a pod to its end and removes it.
func (a *api) run(ctx context.Context, p pod) (outcome, error) {
	if err := a.start(ctx, p); err != nil {
		return outcome{}, err
	}
	var o outcome
	var err error
	o.podState, err = a.awaitPod(ctx, p.name, "to end", func(s *podState) bool {
		var ended bool
		o.code, ended = s.ended()
		return ended
	})
	if err != nil {
		return o, err
	}
	if o.log, err = a.log(ctx, p.name); err != nil {
		return o, err
	}
	return o, a.remove(ctx, p.name)
}

func (o outcome) String() string {
	return fmt.Sprintf("exit code %d, it said:\n%s", o.code, o.log)
}
