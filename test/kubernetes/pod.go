package kubernetes

import (
	"cmp"
	"context"
	"fmt"
	"net/http"
	"strings"
)

// Namespace is that of all pods.
const Namespace = "shop"

// TokenFile is where a pod with an Audience finds its token.
const TokenFile = "/var/run/secrets/klamm/token"

// Pod is one to make.
type Pod struct {
	Name    string
	Image   string // "": ClientImage
	Command string // run by its shell
	Restart string // restartPolicy; "": Never
	Root    bool   // with NET_ADMIN and NET_RAW, and loopback addresses that may be routed
	Labels  string // as YAML, like {app: orders}; "": none

	HostNetwork bool // in the network namespace of the node

	ServiceAccount string // "": default
	Audience       string // of a service account token, of the least life there is, in TokenFile; "": no token
}

func (p Pod) manifest() string {
	security, container := "{}", "{capabilities: {drop: [ALL]}}"
	if p.Root {
		security = `{sysctls: [{name: net.ipv4.conf.all.route_localnet, value: "1"}]}`
		container = "{capabilities: {add: [NET_ADMIN, NET_RAW]}}"
	}
	volumes, mounts := "[]", "[]"
	if p.Audience != "" {
		volumes = fmt.Sprintf("[{name: klamm, projected: {sources: [{serviceAccountToken: "+
			"{audience: %q, expirationSeconds: 600, path: token}}]}}]", p.Audience)
		mounts = "[{name: klamm, mountPath: /var/run/secrets/klamm, readOnly: true}]"
	}
	return fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: %q, namespace: %s, labels: %s}
spec:
  restartPolicy: %s
  terminationGracePeriodSeconds: 1
  serviceAccountName: %s
  automountServiceAccountToken: false
  enableServiceLinks: false
  hostNetwork: %t
  securityContext: %s
  volumes: %s
  containers:
  - {name: main, image: %q, imagePullPolicy: Never, command: [/bin/sh, -c, %q], securityContext: %s, volumeMounts: %s}
`, p.Name, Namespace, cmp.Or(p.Labels, "{}"), cmp.Or(p.Restart, "Never"), cmp.Or(p.ServiceAccount, "default"),
		p.HostNetwork, security, volumes, cmp.Or(p.Image, ClientImage), p.Command, container, mounts)
}

// State is what the API server tells of a pod, as far as checks read it.
type State struct {
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

// ContainerID is the id of its container, "" before there is one.
func (s *State) ContainerID() string {
	if len(s.Status.ContainerStatuses) == 0 {
		return ""
	}
	return strings.TrimPrefix(s.Status.ContainerStatuses[0].ContainerID, "containerd://")
}

// Running tells whether its container runs.
func (s *State) Running() bool {
	return len(s.Status.ContainerStatuses) > 0 && s.Status.ContainerStatuses[0].State.Running != nil
}

// Ended also tells the exit code of its container.
func (s *State) Ended() (code int, ended bool) {
	if s.Status.Phase != "Succeeded" && s.Status.Phase != "Failed" || len(s.Status.ContainerStatuses) == 0 {
		return 0, false
	}
	if t := s.Status.ContainerStatuses[0].State.Terminated; t != nil {
		return t.ExitCode, true
	}
	return 0, false
}

const pods = "/api/v1/namespaces/" + Namespace + "/pods"

// Start makes a pod.
func (a *API) Start(ctx context.Context, p Pod) error {
	_, err := a.Call(ctx, http.MethodPost, pods, p.manifest())
	return err
}

// State asks for a pod.
func (a *API) State(ctx context.Context, name string) (*State, error) {
	var s State
	return &s, a.Get(ctx, pods+"/"+name, &s)
}

// AwaitPod waits until a pod is as wanted.
func (a *API) AwaitPod(ctx context.Context, name, what string, wanted func(*State) bool) (*State, error) {
	var s *State
	err := Await(ctx, name+" "+what, func() (_ bool, err error) {
		if s, err = a.State(ctx, name); err != nil {
			return false, err
		}
		return wanted(s), nil
	})
	return s, err
}

// Log is what a pod has printed.
func (a *API) Log(ctx context.Context, name string) (string, error) {
	text, err := a.Call(ctx, http.MethodGet, pods+"/"+name+"/log", "")
	return string(text), err
}

// Delete deletes a pod; it may take a while to end.
func (a *API) Delete(ctx context.Context, name string) error {
	_, err := a.Call(ctx, http.MethodDelete, pods+"/"+name, "")
	return err
}

// Remove deletes a pod and waits until it is gone, from the node too.
func (a *API) Remove(ctx context.Context, name string) error {
	if err := a.Delete(ctx, name); err != nil {
		return err
	}
	return Await(ctx, "the end of "+name, func() (bool, error) {
		_, err := a.State(ctx, name)
		if Is(err, http.StatusNotFound) {
			return true, nil
		}
		return false, err
	})
}

// Outcome is how a pod that runs to its end ended.
type Outcome struct {
	*State
	Code int
	Log  string
}

// Run runs a pod to its end and removes it.
func (a *API) Run(ctx context.Context, p Pod) (Outcome, error) {
	if err := a.Start(ctx, p); err != nil {
		return Outcome{}, err
	}
	var o Outcome
	var err error
	o.State, err = a.AwaitPod(ctx, p.Name, "to end", func(s *State) bool {
		var ended bool
		o.Code, ended = s.Ended()
		return ended
	})
	if err != nil {
		return o, err
	}
	if o.Log, err = a.Log(ctx, p.Name); err != nil {
		return o, err
	}
	return o, a.Remove(ctx, p.Name)
}

func (o Outcome) String() string {
	return fmt.Sprintf("exit code %d, it said:\n%s", o.Code, o.Log)
}
