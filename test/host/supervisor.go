package host

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"klamm/test/kafka"
)

// Supervisor runs a node as systemd does: it keeps the file descriptors that the node stores, hands them to the next
// one, and learns by sd_notify(3) that it is up.
type Supervisor struct {
	place   kafka.Place
	command []string
	log     *os.File
	notify  *net.UnixConn

	mu     sync.Mutex
	stored map[string][]*os.File
	ready  chan struct{} // closed when the node that was started last is up
	cmd    *exec.Cmd
}

// NewSupervisor supervises a command. What it prints goes to log.
func NewSupervisor(place kafka.Place, dir string, log *os.File, command ...string) (*Supervisor, error) {
	address := &net.UnixAddr{Name: filepath.Join(dir, "notify"), Net: "unixgram"}
	conn, err := net.ListenUnixgram("unixgram", address)
	if err != nil {
		return nil, err
	}
	s := &Supervisor{place: place, command: command, log: log, notify: conn, stored: map[string][]*os.File{}}
	go s.listen()
	return s, nil
}

func (s *Supervisor) listen() {
	state, rights := make([]byte, 4096), make([]byte, 4096)
	for {
		n, m, _, _, err := s.notify.ReadMsgUnix(state, rights)
		if err != nil {
			return
		}
		files := received(rights[:m])
		s.mu.Lock()
		s.told(strings.Split(string(state[:n]), "\n"), files)
		s.mu.Unlock()
	}
}

func received(rights []byte) (files []*os.File) {
	messages, err := unix.ParseSocketControlMessage(rights)
	if err != nil {
		return nil
	}
	for _, m := range messages {
		fds, _ := unix.ParseUnixRights(&m) // of another kind: none
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "stored"))
		}
	}
	return files
}

func (s *Supervisor) told(lines []string, files []*os.File) {
	name := ""
	for _, line := range lines {
		if value, is := strings.CutPrefix(line, "FDNAME="); is {
			name = value
		}
	}
	switch lines[0] {
	case "FDSTORE=1":
		if s.stored[name] == nil {
			s.stored[name] = files
			return
		}
	case "FDSTOREREMOVE=1":
		closeFiles(s.stored[name])
		delete(s.stored, name)
	case "READY=1":
		close(s.ready)
	}
	closeFiles(files) // what is stored already is not stored twice
}

func closeFiles(files []*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
}

// Start starts the node with what the one before it stored, and waits until it is up.
func (s *Supervisor) Start(more ...string) error {
	s.mu.Lock()
	var files []*os.File
	for _, of := range s.stored {
		files = append(files, of...)
	}
	s.ready = make(chan struct{})
	ready := s.ready
	s.mu.Unlock()

	// sd_listen_fds(3) wants the pid of the process itself, which is known only within it.
	cmd := exec.Command("/bin/sh", slices.Concat([]string{"-c", `LISTEN_PID=$$ exec "$@"`, "sh"}, s.command, more)...)
	cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+s.notify.LocalAddr().String(),
		fmt.Sprintf("LISTEN_FDS=%d", len(files)))
	cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = s.log, s.log, files
	if err := s.place.Start(cmd); err != nil {
		return err
	}
	s.cmd = cmd
	select {
	case <-ready:
		return nil
	case <-time.After(readyTimeout):
		return errors.Join(fmt.Errorf("%s was not up after %v, see %s", cmd, readyTimeout, s.log.Name()),
			s.End(syscall.SIGKILL))
	}
}

// Command is the node that was started last.
func (s *Supervisor) Command() *exec.Cmd { return s.cmd }

// End ends the node by a signal and waits for it.
func (s *Supervisor) End(how syscall.Signal) error { return EndBy(s.cmd, how) }

// EndBy ends a process by a signal and waits for it. That it was not its own wish to end is no error, nor that there is
// none, or not any more.
func EndBy(cmd *exec.Cmd, how syscall.Signal) error {
	if cmd == nil || cmd.ProcessState != nil {
		return nil
	}
	if err := cmd.Process.Signal(how); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	err := cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ProcessState.Sys().(syscall.WaitStatus).Signaled() {
		return nil
	}
	return err
}

// Forget closes what the node stored, as systemd does when a unit is stopped.
func (s *Supervisor) Forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, files := range s.stored {
		closeFiles(files)
		delete(s.stored, name)
	}
}

// Close ends supervision.
func (s *Supervisor) Close() error {
	s.Forget()
	return s.notify.Close()
}
