package wire

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
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
		t.Run(fmt.Sprintf("seed %#x", seed), func(t *testing.T) { checkPipe(t, seed) })
	}
}

func FuzzPipe(f *testing.F) {
	f.Add(uint64(1 << 40))
	f.Fuzz(checkPipe)
}

func checkPipe(t *testing.T, seed uint64) {
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
	p := NewPipe(src, &got, budget.Open("", nil, nil), nil, nil)
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
	if n := budget.Held(); n != 0 {
		t.Errorf("the budget is not whole again: %d bytes are held", n)
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
	p := NewPipe(bytes.NewReader([]byte("abc")), io.Discard, NewBudget(0).Open("", nil, nil), nil, nil)
	if _, err := p.Need(4); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("%v", err)
	}
}

func TestNothingIsWrittenWhenWhatComesBeforeFails(t *testing.T) {
	var out bytes.Buffer
	failure := errors.New("the audit is full")
	account := NewBudget(0).Open("", nil, nil)
	p := NewPipe(bytes.NewReader([]byte("abc")), &out, account, func() error { return failure }, nil)
	if _, err := p.Need(3); err != nil {
		t.Fatal(err)
	}
	p.Pass(3)
	if err := p.Flush(); !errors.Is(err, failure) || out.Len() > 0 {
		t.Errorf("%v, and %d bytes were written", err, out.Len())
	}
}

func TestABufferBeyondTheBudgetIsRefused(t *testing.T) {
	p := NewPipe(bytes.NewReader(make([]byte, 1<<20)), io.Discard, NewBudget(BaseBuffer).Open("", nil, nil), nil, nil)
	if _, err := p.Need(1 << 20); !errors.Is(err, ErrBudget) {
		t.Errorf("%v", err)
	}
}

// A pipe that grows must not wait for the share it holds itself.
func TestAFrameAsLargeAsTheBudgetFollowsASmallerOne(t *testing.T) {
	const budget = 4 << 20
	p := NewPipe(bytes.NewReader(make([]byte, 8<<20)), io.Discard, NewBudget(budget).Open("", nil, nil), nil, nil)
	for _, n := range []int{BaseBuffer + 1, budget} {
		if _, err := p.Need(n); err != nil {
			t.Fatalf("%d bytes: %v", n, err)
		}
		p.Pass(n)
	}
}

func TestAWipedPipeKeepsOnlyWhatIsNotJudged(t *testing.T) {
	var sent bytes.Buffer
	p := NewPipe(strings.NewReader("a secret; then the next frame"), &sent, NewBudget(0).Open("", nil, nil), nil, nil)
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
				p := NewPipe(src, io.Discard, NewBudget(1<<20).Open("", nil, nil), nil, nil)
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

// What holds no memory may wait for ever, and what has begun may not.
// slowly is a writer that takes its time.
type slowly time.Duration

func (s slowly) Write(b []byte) (int, error) {
	time.Sleep(time.Duration(s))
	return len(b), nil
}

func TestASlowReaderIsNotTheSendersFault(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src, peer := net.Pipe()
		p := NewPipe(src, slowly(2*stallTimeout), NewBudget(1<<20).Open("", nil, nil), nil, nil)
		defer p.Close()
		var sender sync.WaitGroup
		sender.Go(func() {
			for range 2 {
				_, _ = peer.Write([]byte("a")) // fails with the pipe
			}
		})
		for range 2 {
			if _, err := p.Rest(1); err != nil {
				t.Error(err)
				break
			}
			p.Pass(1)
		}
		if err := errors.Join(src.Close(), peer.Close()); err != nil {
			t.Error(err)
		}
		sender.Wait()
	})
}

func TestTheRestOfAFrameMustCome(t *testing.T) {
	const forever, slowly = 24 * time.Hour, 10 * time.Second
	for name, c := range map[string]struct {
		need  int
		rest  bool // of a frame that is streamed
		comes []string
		gap   time.Duration // before each
		want  error
		after time.Duration
	}{
		"a frame that begins late":           {4, false, []string{"abcd"}, forever, nil, forever},
		"a frame of which a part comes":      {4, false, []string{"a"}, 0, ErrStalled, stallTimeout},
		"a frame that comes late and slowly": {3, false, strings.Split("abc", ""), slowly, nil, 3 * slowly},
		"a frame that comes too slowly":      {9, false, strings.Split("abcdefg", ""), slowly, ErrStalled, 40 * time.Second},
		"a streamed frame that goes on":      {1, true, []string{"a"}, stallTimeout - 1, nil, stallTimeout - 1},
		"a streamed frame that goes not on":  {1, true, nil, 0, ErrStalled, stallTimeout},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				src, peer := net.Pipe()
				p := NewPipe(src, io.Discard, NewBudget(1<<20).Open("", nil, nil), nil, nil)
				defer p.Close()
				var sender sync.WaitGroup
				sender.Go(func() {
					for _, text := range c.comes {
						time.Sleep(c.gap)
						if _, err := peer.Write([]byte(text)); err != nil {
							return // no longer read
						}
					}
				})
				need, start := p.Need, time.Now()
				if c.rest {
					need = p.Rest
				}
				_, err := need(c.need)
				if took := time.Since(start).Round(time.Second); !errors.Is(err, c.want) || took != c.after.Round(time.Second) {
					t.Errorf("got %v after %v", err, took)
				}
				if err := errors.Join(src.Close(), peer.Close()); err != nil {
					t.Error(err)
				}
				sender.Wait()
			})
		})
	}
}

// It ends with the time-out, which is no fault of the other side, and only when nothing comes for so long.
func TestAPipeInAHurryWaitsNotLongForMore(t *testing.T) {
	for name, begun := range map[string]string{"between two frames": "", "within a frame": "a"} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				src, peer := net.Pipe()
				p := NewPipe(src, io.Discard, NewBudget(1<<20).Open("", nil, nil), nil, nil)
				defer p.Close()
				got := make(chan error, 2)
				go func() {
					for _, n := range []int{4, 4} {
						_, err := p.Need(n)
						p.Drop(p.Buffered())
						got <- err
					}
				}()
				if _, err := peer.Write([]byte(begun)); err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				if err := p.Hurry(time.Second); err != nil {
					t.Fatal(err)
				}
				for rest := "abcd"[len(begun):]; rest != ""; rest = rest[1:] {
					time.Sleep(time.Second - 1)
					if _, err := peer.Write([]byte(rest[:1])); err != nil {
						t.Fatal(err)
					}
				}
				if err := <-got; err != nil {
					t.Error(err)
				}
				start := time.Now()
				if err := <-got; !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(start) != time.Second {
					t.Errorf("got %v after %v", err, time.Since(start))
				}
				if err := errors.Join(src.Close(), peer.Close()); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// A pipe that never rests gives its memory to who waits for it, between two frames.
func TestABusyPipeGivesWay(t *testing.T) {
	const frame = 100_000
	budget := NewBudget(HeldSize(frame))
	p := NewPipe(bytes.NewReader(make([]byte, 100*frame)), io.Discard, budget.Open("busy", nil, nil), nil, nil)
	defer p.Close()
	other := budget.Open("other", nil, nil)
	defer other.Close()
	next := func() {
		if _, err := p.Need(frame); err != nil {
			t.Fatal(err)
		}
		p.Pass(frame)
	}
	next()
	got := make(chan error, 1)
	go func() { got <- other.Acquire(1) }()
	for !other.Crowded() {
		time.Sleep(time.Millisecond)
	}
	go func() {
		got <- <-got
		other.Release(1)
	}()
	for range 50 {
		next()
	}
	if err := <-got; err != nil {
		t.Error(err)
	}
}

// It does so once for each frame, and never in the midst of one: its memory would go to who waits for more of it.
func TestAPipeKeepsItsShareUntilTheFrameIsThere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const frame = 2 * BaseBuffer
		budget := NewBudget(2 * frame)
		src, peer := net.Pipe()
		p := NewPipe(src, io.Discard, budget.Open("modest", nil, nil), nil, nil)
		got := make(chan error, 1)
		go func() {
			_, err := p.Need(frame)
			got <- err
		}()
		for at := 0; at < frame; at += frame / 8 { // in pieces
			if _, err := peer.Write(make([]byte, frame/8)); err != nil {
				t.Fatal(err)
			}
			if at == 0 { // others want more than there is
				for range 3 {
					go func() { _ = budget.Open("greedy", nil, nil).Acquire(frame) }() // it gets it, or not
				}
			}
			synctest.Wait()
			if n := p.account.held; n != frame {
				t.Errorf("after %d bytes %d are held", at, n)
			}
		}
		if err := <-got; err != nil {
			t.Error(err)
		}
		if err := errors.Join(src.Close(), peer.Close()); err != nil {
			t.Error(err)
		}
		time.Sleep(2 * budgetWait) // for the others
	})
}

func TestALargeBufferGoesBackWhenSmallFramesFollow(t *testing.T) {
	const large, small = 1 << 20, 1000
	budget := NewBudget(HeldSize(large))
	p := NewPipe(bytes.NewReader(make([]byte, large+1000*small)), io.Discard, budget.Open("", nil, nil), nil, nil)
	defer p.Close()
	for i := range 1000 {
		n := small
		if i == 0 {
			n = large
		}
		if _, err := p.Need(n); err != nil {
			t.Fatal(err)
		}
		p.Pass(n)
	}
	if n := budget.Held(); n != 0 {
		t.Errorf("%d bytes are held", n)
	}
}
