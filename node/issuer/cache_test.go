package issuer

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"
)

// source makes leaves of a life of a minute, or fails.
type source struct {
	t    *testing.T
	ca   *signer
	life time.Duration

	made atomic.Int32
	fail atomic.Bool
	wait chan struct{} // nil: it does not wait
}

func (s *source) Leaf(ctx context.Context, names []string) (*tls.Certificate, error) {
	s.made.Add(1)
	if s.wait != nil {
		select {
		case <-s.wait:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if s.fail.Load() {
		return nil, failed("the source", names, errors.New("it does not work"))
	}
	leaf := s.ca.make(s.t, func(c *x509.Certificate) {
		named(names...)(c)
		c.NotAfter = time.Now().Add(s.life)
	})
	return &tls.Certificate{Certificate: [][]byte{leaf.cert.Raw}, PrivateKey: leaf.key}, nil
}

// cached runs a test in a bubble in which time stands still until all wait.
func cached(t *testing.T, test func(t *testing.T, s *source, c *Cache)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s := &source{t: t, life: time.Hour}
		s.ca = (*signer)(nil).make(t, func(c *x509.Certificate) {
			authorityOf(c)
			c.NotAfter = time.Now().Add(1000 * time.Hour)
		})
		c := NewCache(s, zerolog.Nop())
		test(t, s, c)
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
}

var broker = []string{"broker-1.example"}

func TestManyWhoAskAtOnceGetOneCertificate(t *testing.T) {
	cached(t, func(t *testing.T, s *source, c *Cache) {
		s.wait = make(chan struct{})
		var all sync.WaitGroup
		for range 100 {
			all.Go(func() {
				if _, err := c.Leaf(t.Context(), broker); err != nil {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := c.Leaf(ctx, broker); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("who does not wait that long: %v", err)
		}
		close(s.wait)
		all.Wait()
		if _, err := c.Leaf(t.Context(), []string{"broker-2.example"}); err != nil {
			t.Error(err)
		}
		if n := s.made.Load(); n != 2 {
			t.Errorf("%d were made for two names", n)
		}
	})
}

func TestTheOrderOfNamesMakesNoOtherCertificate(t *testing.T) {
	cached(t, func(t *testing.T, s *source, c *Cache) {
		for range 2 {
			names := []string{"b.example", "a.example"}
			if _, err := c.Leaf(t.Context(), names); err != nil || !slices.Equal(names, []string{"b.example", "a.example"}) {
				t.Error(names, err)
			}
			slices.Reverse(names)
			if _, err := c.Leaf(t.Context(), names); err != nil {
				t.Error(err)
			}
		}
		if n := s.made.Load(); n != 1 {
			t.Errorf("%d were made", n)
		}
	})
}

func TestACertificateInUseIsRenewedInTime(t *testing.T) {
	cached(t, func(t *testing.T, s *source, c *Cache) {
		first, err := c.Leaf(t.Context(), broker)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(30 * time.Minute)
		if again, err := c.Leaf(t.Context(), broker); err != nil || again != first || s.made.Load() != 1 {
			t.Errorf("half its life over: %v, %d made", err, s.made.Load())
		}
		time.Sleep(13 * time.Minute) // 2/3, and half the spread
		synctest.Wait()
		if s.made.Load() != 2 {
			t.Errorf("%d were made before anybody asked", s.made.Load())
		}
		if next, err := c.Leaf(t.Context(), broker); err != nil || next == first {
			t.Errorf("it is not the new one: %v", err)
		}
	})
}

func TestACertificateThatNobodyUsesIsForgotten(t *testing.T) {
	cached(t, func(t *testing.T, s *source, c *Cache) {
		if _, err := c.Leaf(t.Context(), broker); err != nil {
			t.Fatal(err)
		}
		time.Sleep(24 * time.Hour)
		synctest.Wait()
		if len(c.leaves) != 0 || s.made.Load() != 1 {
			t.Errorf("%d are kept, %d were made", len(c.leaves), s.made.Load())
		}
	})
}

func TestTheLastCertificateIsUsedUntilItExpires(t *testing.T) {
	cached(t, func(t *testing.T, s *source, c *Cache) {
		first, err := c.Leaf(t.Context(), broker)
		if err != nil {
			t.Fatal(err)
		}
		if _, err = c.Leaf(t.Context(), broker); err != nil { // it is in use
			t.Fatal(err)
		}
		s.fail.Store(true)
		time.Sleep(59 * time.Minute)
		if got, err := c.Leaf(t.Context(), broker); err != nil || got != first {
			t.Errorf("a minute before its end: %v", err)
		}
		if n := s.made.Load(); n < 5 || n > 20 {
			t.Errorf("the issuer was asked %d times", n)
		}
		time.Sleep(2 * time.Minute)
		if _, err := c.Leaf(t.Context(), broker); err == nil {
			t.Error("it is shown after its end")
		}
		s.fail.Store(false)
		time.Sleep(retryMax)
		synctest.Wait()
		if got, err := c.Leaf(t.Context(), broker); err != nil || got == first {
			t.Errorf("when the issuer is back: %v", err)
		}
	})
}

func TestAnIssuerThatFailsIsNotAskedForEachConnection(t *testing.T) {
	cached(t, func(t *testing.T, s *source, c *Cache) {
		s.fail.Store(true)
		for range 100 {
			if _, err := c.Leaf(t.Context(), broker); err == nil {
				t.Fatal("there is a certificate")
			}
		}
		if n := s.made.Load(); n != 1 {
			t.Errorf("it was asked %d times at once", n)
		}
		s.fail.Store(false)
		time.Sleep(retryMin)
		if _, err := c.Leaf(t.Context(), broker); err != nil {
			t.Errorf("a second later: %v", err)
		}
	})
}

func TestWhatAnIssuerGivesIsLookedAt(t *testing.T) {
	cached(t, func(t *testing.T, s *source, c *Cache) {
		s.life = -time.Minute
		if _, err := c.Leaf(t.Context(), broker); err == nil {
			t.Error("an expired certificate is shown")
		}
	})
}

func TestCloseEndsWhatIsAskedFor(t *testing.T) {
	cached(t, func(t *testing.T, s *source, c *Cache) {
		s.wait = make(chan struct{}) // for ever
		asked := make(chan error)
		go func() {
			_, err := c.Leaf(context.Background(), broker)
			asked <- err
		}()
		synctest.Wait()
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		if err := <-asked; err == nil {
			t.Error("there is a certificate")
		}
	})
}
