package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"klamm/bpf"
)

// serveControl answers at the control socket until ctx ends: status, what brokers say, enrolment, hand-over. Only root
// can connect.
func (n *Node) serveControl(ctx context.Context, failed chan<- error) error {
	path := n.config.Node.Socket
	if path == "" {
		return nil
	}
	l, err := listenControl(path)
	if err != nil {
		return fmt.Errorf("node.socket: %w", err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", n.serveStatus)
	mux.HandleFunc("GET "+checkPath, n.serveCheck)
	mux.HandleFunc("GET "+aclsPath, n.serveACLs)
	mux.HandleFunc("POST /v1/handover", n.handOver)
	mux.Handle("POST /v1/enrol", enrolHandler(n.redirect.enrolled))
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	go func() {
		if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			failed <- fmt.Errorf("serving %s: %w", path, err)
		}
	}()
	context.AfterFunc(ctx, func() { _ = server.Close() })
	return nil
}

// listenControl puts the socket into place under a name of its own first: who connects finds the old node or the new
// one, and never none.
func listenControl(path string) (*net.UnixListener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("make a directory for the control socket: %w", err)
	}
	aside := fmt.Sprintf("%s.%d", path, os.Getpid())
	_ = os.Remove(aside)
	mask := syscall.Umask(0o177)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: aside, Net: "unix"})
	syscall.Umask(mask)
	if err != nil {
		return nil, fmt.Errorf("listen at the control socket: %w", err)
	}
	l.SetUnlinkOnClose(false) // it may be the next node's by then
	if err := os.Rename(aside, path); err != nil {
		return nil, errors.Join(fmt.Errorf("put the control socket into place: %w", err), l.Close())
	}
	return l, nil
}

func (n *Node) serveStatus(w http.ResponseWriter, _ *http.Request) {
	status, err := n.Status()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(status)
}

// Ask gets what the node at a control socket answers to GET, as JSON. ErrNobody if there is no node.
func Ask(ctx context.Context, socket, path string, into any) error {
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		}}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://klamm"+path, nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return fmt.Errorf("ask the node at %s: %w: %w", socket, ErrNobody, err)
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("ask the node at %s: %s", socket, resp.Status)
	}
	return json.NewDecoder(resp.Body).Decode(into)
}

// ErrRunning is returned where a node runs already.
var ErrRunning = bpf.ErrRunning

// Uninstall removes all that outlives the node. ErrRunning while one runs.
func Uninstall(c Config) error {
	if c.Node.Pins != "" {
		if err := bpf.Uninstall(c.Node.Pins); err != nil {
			return err
		}
	}
	if c.Intercept.Firewall {
		if err := RemoveFirewall(firewallTable); err != nil {
			return err
		}
	}
	if c.Node.Socket == "" {
		return nil
	}
	if err := os.Remove(c.Node.Socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove the control socket: %w", err)
	}
	return nil
}
