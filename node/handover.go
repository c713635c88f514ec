package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// A node hands over to the next on a connection to its control socket: POST /v1/handover, answered not by HTTP but by
// messages of one byte, each with file descriptors (SCM_RIGHTS). Both serve the same listeners until the new one says
// that it accepts; then the old one drains and ends. If the connection ends before, nothing has changed.
const (
	handoverLock      = 'l' // with the lock on the pins
	handoverListeners = 'n' // with listeners
	handoverEnd       = '.'
	handoverTaken     = 'k' // from the new one: it accepts

	handoverTimeout = 30 * time.Second // for the new node to be up
	rightsPerTime   = 64               // of SCM_MAX_FD, 253
)

// handOver is the old node's side.
func (n *Node) handOver(w http.ResponseWriter, _ *http.Request) {
	c, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	defer func() { _ = c.Close() }()
	conn, ok := c.(*net.UnixConn)
	if !ok {
		return
	}
	// Until it is decided who is in charge, what the next node changes is not put back.
	n.handing.Store(true)
	if err := n.giveAll(conn); err != nil {
		n.handing.Store(false)
		n.log.Warn().Err(err).Msg("not handed over: this node goes on")
		return
	}
	n.log.Info().Msg("handed over to the next node; draining")
	n.replaced()
}

func (n *Node) giveAll(conn *net.UnixConn) error {
	if err := conn.SetDeadline(time.Now().Add(handoverTimeout)); err != nil {
		return err
	}
	listeners := n.redirect.enrolled.listeners()
	defer closeAll(listeners)
	if lock := n.redirect.programs.Lock(); lock != nil {
		if err := give(conn, handoverLock, []*os.File{lock}); err != nil {
			return err
		}
	}
	for first := 0; first < len(listeners); first += rightsPerTime {
		if err := give(conn, handoverListeners, listeners[first:min(first+rightsPerTime, len(listeners))]); err != nil {
			return err
		}
	}
	if err := give(conn, handoverEnd, nil); err != nil {
		return err
	}
	// The new node binds the control socket's path once more: it must not be removed from under it.
	answer := make([]byte, 1)
	if _, err := io.ReadFull(conn, answer); err != nil || answer[0] != handoverTaken {
		return fmt.Errorf("the next node did not come up: %w", errors.Join(err, io.ErrUnexpectedEOF))
	}
	return nil
}

func give(conn *net.UnixConn, what byte, files []*os.File) error {
	rights, err := rightsOf(files)
	if err != nil {
		return err
	}
	_, _, err = conn.WriteMsgUnix([]byte{what}, rights, nil)
	return err
}

func closeAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
}

// ErrNobody says that no node answers at the control socket.
var ErrNobody = errors.New("no node answers there")

// takeOverFrom is the new node's side. taken must be called once the node accepts; until then the old one does too.
func takeOverFrom(ctx context.Context, socket string) (_ inheritance, taken func() error, err error) {
	c, err := new(net.Dialer).DialContext(ctx, "unix", socket)
	if err != nil {
		return inheritance{}, nil, fmt.Errorf("replace the node at %s: %w: %w", socket, ErrNobody, err)
	}
	conn := c.(*net.UnixConn)
	var i inheritance
	defer func() {
		if err != nil {
			i.close()
			err = fmt.Errorf("replace the node at %s: %w", socket, errors.Join(err, conn.Close()))
		}
	}()
	if err := conn.SetDeadline(time.Now().Add(handoverTimeout)); err != nil {
		return i, nil, err
	}
	const request = "POST /v1/handover HTTP/1.1\r\nHost: klamm\r\nContent-Length: 0\r\n\r\n"
	if _, err := io.WriteString(conn, request); err != nil {
		return i, nil, err
	}
	for {
		what, files, err := take(conn)
		if err != nil {
			return i, nil, err
		}
		switch what {
		case handoverLock:
			i.lock = files[0]
		case handoverListeners:
			i.listeners = append(i.listeners, files...)
		case handoverEnd:
			return i, func() error {
				_, err := conn.Write([]byte{handoverTaken})
				return errors.Join(err, conn.Close())
			}, nil
		default:
			return i, nil, errors.New("it answers as no node of this version does")
		}
	}
}

func take(conn *net.UnixConn) (what byte, files []*os.File, err error) {
	b, rights := make([]byte, 1), make([]byte, unix.CmsgSpace(4*rightsPerTime))
	n, m, flags, _, err := conn.ReadMsgUnix(b, rights)
	if err != nil {
		return 0, nil, err
	}
	if n == 0 || flags&unix.MSG_CTRUNC != 0 {
		return 0, nil, io.ErrUnexpectedEOF
	}
	messages, err := unix.ParseSocketControlMessage(rights[:m])
	if err != nil {
		return 0, nil, err
	}
	for _, message := range messages {
		fds, err := unix.ParseUnixRights(&message)
		if err != nil {
			return 0, nil, err
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "inherited descriptor"))
		}
	}
	if (b[0] == handoverLock || b[0] == handoverListeners) && len(files) == 0 {
		return 0, nil, errors.New("its descriptors did not arrive")
	}
	return b[0], files, nil
}

func (i *inheritance) close() {
	closeAll(i.listeners)
	if i.lock != nil {
		_ = i.lock.Close()
	}
}
