package node

import (
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// adoptListener makes a listener of an inherited file descriptor, with the network namespace it is in. It is stamped
// anew: the programs may be of another version than those that stamped it.
func adoptListener(f *os.File, stamp func(fd int) error) (_ *net.TCPListener, _ *netns, err error) {
	defer func() { err = errors.Join(err, f.Close()) }()
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, nil, err
	}
	var ns *netns
	err = control(raw, func(fd int) (err error) {
		listens, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
		if err == nil && listens == 0 {
			err = unix.EINVAL
		}
		if err == nil {
			err = stamp(fd)
		}
		if err == nil {
			ns, err = netnsOf(fd)
		}
		return err
	})
	if err != nil {
		return nil, nil, fmt.Errorf("%s is no listener of a node: %w", f.Name(), err)
	}
	l, err := net.FileListener(f)
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("adopt %s: %w", f.Name(), err), ns.Close())
	}
	tcp, ok := l.(*net.TCPListener)
	if !ok {
		return nil, nil, errors.Join(fmt.Errorf("%s is not of TCP", f.Name()), l.Close(), ns.Close())
	}
	return tcp, ns, nil
}
