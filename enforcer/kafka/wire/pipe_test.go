package wire

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// Random passes, drops and emits, over a socket and over a plain reader, give what the same steps give on plain bytes.
func TestAPipeCarriesWhatIsPassedAndEmitted(t *testing.T) {
	for range 60 {
		seed := rand.Uint64()
		t.Run(fmt.Sprintf("seed %#x", seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 0))
			input := make([]byte, r.IntN(2<<20))
			for i := range input {
				input[i] = byte(r.Uint32())
			}
			src := io.Reader(bytes.NewReader(input))
			if r.IntN(2) == 0 {
				src = socketWith(t, input)
			}
			var got, want bytes.Buffer
			budget := NewBudget(8 << 20)
			p := NewPipe(src, &got, budget, nil, nil)
			for left := input; len(left) > 0; {
				n := min(len(left), 1+r.IntN(1<<r.IntN(20)))
				b, err := p.Need(n)
				if err != nil || !bytes.Equal(b, left[:n]) {
					t.Fatalf("the next %d bytes: %v, or others than came", n, err)
				}
				switch r.IntN(4) {
				case 0:
					p.Drop(n)
					p.Emit([]byte("instead"))
					want.WriteString("instead")
				case 1:
					k := r.IntN(n + 1)
					p.Pass(k)
					p.Drop(n - k)
					want.Write(left[:k])
				default:
					p.Pass(n)
					want.Write(left[:n])
				}
				left = left[n:]
				if r.IntN(10) == 0 {
					if err := p.Flush(); err != nil {
						t.Fatal(err)
					}
				}
			}
			if _, err := p.Need(1); !errors.Is(err, io.EOF) {
				t.Errorf("at the end: %v", err)
			}
			if !bytes.Equal(got.Bytes(), want.Bytes()) {
				t.Errorf("%d bytes came out, %d should have", got.Len(), want.Len())
			}
			p.Close()
			if err := budget.Acquire(8 << 20); err != nil {
				t.Errorf("the budget is not whole again: %v", err)
			}
		})
	}
}

// socketWith is a connection from which b can be read.
func socketWith(t *testing.T, b []byte) net.Conn {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	w, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	go func() {
		_, _ = w.Write(b) // an error shows as bytes that are missing
		_ = w.Close()
	}()
	return c
}

func TestAnEndWithinAFrameIsNoOrderlyEnd(t *testing.T) {
	p := NewPipe(bytes.NewReader([]byte("abc")), io.Discard, NewBudget(0), nil, nil)
	if _, err := p.Need(4); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("%v", err)
	}
}

func TestNothingIsWrittenWhenWhatComesBeforeFails(t *testing.T) {
	var out bytes.Buffer
	failure := errors.New("the audit is full")
	p := NewPipe(bytes.NewReader([]byte("abc")), &out, NewBudget(0), func() error { return failure }, nil)
	if _, err := p.Need(3); err != nil {
		t.Fatal(err)
	}
	p.Pass(3)
	if err := p.Flush(); !errors.Is(err, failure) || out.Len() > 0 {
		t.Errorf("%v, and %d bytes were written", err, out.Len())
	}
}

func TestABufferBeyondTheBudgetIsRefused(t *testing.T) {
	p := NewPipe(bytes.NewReader(make([]byte, 1<<20)), io.Discard, NewBudget(BaseBuffer), nil, nil)
	if _, err := p.Need(1 << 20); !errors.Is(err, ErrBudget) {
		t.Errorf("%v", err)
	}
}

// A pipe that grows must not wait for the share it holds itself.
func TestAFrameAsLargeAsTheBudgetFollowsASmallerOne(t *testing.T) {
	const budget = 4 << 20
	p := NewPipe(bytes.NewReader(make([]byte, 8<<20)), io.Discard, NewBudget(budget), nil, nil)
	for _, n := range []int{BaseBuffer + 1, budget} {
		if _, err := p.Need(n); err != nil {
			t.Fatalf("%d bytes: %v", n, err)
		}
		p.Pass(n)
	}
}

func TestAWipedPipeKeepsOnlyWhatIsNotJudged(t *testing.T) {
	var sent bytes.Buffer
	p := NewPipe(strings.NewReader("a secret; then the next frame"), &sent, NewBudget(0), nil, nil)
	defer p.Close()
	if _, err := p.Need(9); err != nil {
		t.Fatal(err)
	}
	p.Pass(9)
	if err := p.Flush(); err != nil {
		t.Fatal(err)
	}
	p.Wipe()
	if bytes.Contains(*p.buf, []byte("secret")) {
		t.Errorf("the buffer still holds %q", (*p.buf)[:40])
	}
	rest, err := p.Need(20)
	if err != nil || string(rest) != " then the next frame" || sent.String() != "a secret;" {
		t.Errorf("the rest is %q, %v; sent is %q", rest, err, &sent)
	}
}

func TestAStoppedPipeWaitsForNoFrameAndNotLongForTheRestOfOne(t *testing.T) {
	for name, c := range map[string]struct {
		need  int
		comes []string // each a second after the one before
		want  error
		after time.Duration
	}{
		"nothing came":                   {4, nil, ErrStopped, 0},
		"all came":                       {4, []string{"abcd"}, nil, 0},
		"the rest comes":                 {4, []string{"a", "b", "c", "d"}, nil, 3 * time.Second},
		"the rest does not come":         {4, []string{"abc"}, ErrStopped, finishTimeout},
		"the rest comes too slowly":      {9, strings.Split("abcdefghi", ""), ErrStopped, finishTimeout},
		"the rest of a large one comes":  {BaseBuffer + 1, []string{"a", strings.Repeat("b", BaseBuffer)}, nil, time.Second},
		"that of a large one comes not":  {BaseBuffer + 1, []string{"a"}, ErrStopped, finishTimeout},
		"nothing came of the next large": {BaseBuffer + 1, nil, ErrStopped, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				src, peer := net.Pipe()
				p := NewPipe(src, io.Discard, NewBudget(1<<20), nil, nil)
				got := make(chan error, 1)
				go func() {
					_, err := p.Need(c.need)
					got <- err
				}()
				var sender sync.WaitGroup
				sender.Go(func() {
					for i, text := range c.comes {
						if i > 0 {
							time.Sleep(time.Second)
						}
						if _, err := peer.Write([]byte(text)); err != nil {
							return // no longer read
						}
					}
				})
				synctest.Wait()
				start := time.Now()
				p.Stop()
				if err := <-got; !errors.Is(err, c.want) || time.Since(start) != c.after {
					t.Errorf("got %v after %v", err, time.Since(start))
				}
				if err := errors.Join(src.Close(), peer.Close()); err != nil {
					t.Error(err)
				}
				sender.Wait()
			})
		})
	}
}
