package node

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"
)

// listenAttempts bounds the search for a port that is free on both loopback addresses.
const listenAttempts = 64

// listener is what one network namespace has: the same port at 127.0.0.1 and, where there is IPv6, at ::1.
type listener struct {
	port uint16
	tcp  []*net.TCPListener
}

func (l listener) Close() error {
	var errs []error
	for _, tcp := range l.tcp {
		errs = append(errs, tcp.Close())
	}
	return errors.Join(errs...)
}

// listen opens the listeners of the calling thread's network namespace. They are stamped, because nobody else may bind
// an enrolled port. avoid are the ports that are broker-bound.
func listen(stamp func(fd int) error, avoid func(port uint16) bool) (listener, error) {
	var err error
	for range listenAttempts {
		var l listener
		l, err = listenOnce(stamp)
		switch {
		case err == nil && avoid(l.port):
			err = errors.Join(fmt.Errorf("port %d is a broker's", l.port), l.Close())
		case err == nil, !errors.Is(err, unix.EADDRINUSE):
			return l, err
		}
	}
	return listener{}, fmt.Errorf("find a port that is free on both loopback addresses, %d times: %w", listenAttempts, err)
}

func listenOnce(stamp func(fd int) error) (listener, error) {
	v4, err := listenAt(stamp, netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), 0))
	if err != nil {
		return listener{}, err
	}
	l := listener{port: netip.MustParseAddrPort(v4.Addr().String()).Port(), tcp: []*net.TCPListener{v4}}
	v6, err := listenAt(stamp, netip.AddrPortFrom(netip.IPv6Loopback(), l.port))
	switch {
	case errors.Is(err, unix.EAFNOSUPPORT): // no IPv6 in this kernel: then no client can connect by it either
		return l, nil
	case err != nil:
		return listener{}, errors.Join(err, l.Close())
	}
	l.tcp = append(l.tcp, v6)
	return l, nil
}

// listenAt binds also where lo is down still, or has no IPv6 address yet (ip(7), IP_FREEBIND): containers' are set up
// while the node looks. The socket must be plain TCP: an MPTCP listener would keep the record on a subflow, where it
// cannot be found by the accepted socket.
func listenAt(stamp func(fd int) error, at netip.AddrPort) (*net.TCPListener, error) {
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		return control(c, func(fd int) error {
			return errors.Join(unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_FREEBIND, 1), stamp(fd))
		})
	}}
	config.SetMultipathTCP(false)
	l, err := config.Listen(context.Background(), "tcp", at.String())
	if err != nil {
		return nil, fmt.Errorf("listen for redirected connections: %w", err)
	}
	return l.(*net.TCPListener), nil
}
