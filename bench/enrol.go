package main

import (
	"encoding/json"
	"errors"
	"flag"
	"net"
	"os"
	"runtime"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	namespaces    = 20
	enrolPatience = 10 * time.Second
	roundTrips    = 20_000
)

// runEnrol prints the median time, in µs, from the first socket of a network namespace to a connect that is redirected.
func runEnrol(args []string) error {
	to, err := target("enrol", args)
	if err != nil {
		return err
	}
	times := make([]float64, namespaces)
	for i := range times {
		done := make(chan error)
		go func() {
			runtime.LockOSThread() // never unlocked: the thread, and the namespace with it, ends with the goroutine
			var err error
			times[i], err = enrolOnce(to)
			done <- err
		}()
		if err := <-done; err != nil {
			return err
		}
	}
	return printMedian(times)
}

func enrolOnce(to unix.Sockaddr) (us float64, err error) {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return 0, err
	}
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		return 0, err
	}
	for begin := time.Now(); ; time.Sleep(50 * time.Microsecond) {
		_, err := connectOnce(to)
		if us := float64(time.Since(begin)) / 1e3; err == nil || us > float64(enrolPatience/time.Microsecond) {
			return us, err
		}
	}
}

// runRoundTrip prints the mean time, in µs, for a byte to a server that sends it back: two packets with data and what
// acknowledges them.
func runRoundTrip(args []string) error {
	flags := flag.NewFlagSet("roundtrip", flag.ContinueOnError)
	addr := flags.String("addr", "", "host:port")
	if err := flags.Parse(args); err != nil {
		return err
	}
	conn, err := net.Dial("tcp", *addr)
	if err != nil {
		return err
	}
	b := make([]byte, 1)
	begin := time.Now()
	for range roundTrips {
		if _, err = conn.Write(b); err == nil {
			_, err = conn.Read(b)
		}
		if err != nil {
			return errors.Join(err, conn.Close())
		}
	}
	us := float64(time.Since(begin)) / 1e3 / roundTrips
	return errors.Join(json.NewEncoder(os.Stdout).Encode(us), conn.Close())
}

func printMedian(times []float64) error {
	slices.Sort(times)
	return json.NewEncoder(os.Stdout).Encode(times[len(times)/2])
}
