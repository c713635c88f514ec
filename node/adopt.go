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
	if listens, err := unix.GetsockoptInt(int(f.Fd()), unix.SOL_SOCKET, unix.SO_ACCEPTCONN); err != nil || listens == 0 {
		return nil, nil, fmt.Errorf("%s does not listen: %w", f.Name(), errors.Join(err, unix.EINVAL))
	}
	if err := stamp(int(f.Fd())); err != nil {
		return nil, nil, err
	}
	ns, err := netnsOf(int(f.Fd()))
	if err != nil {
		return nil, nil, err
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
