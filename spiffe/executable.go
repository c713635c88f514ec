package spiffe

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxExecutable is the largest executable that is hashed, in bytes. A process that runs a larger one is not
	// attested by a rule that asks for the hash.
	maxExecutable = 512 << 20
	// maxHashes bounds the cache of digests.
	maxHashes = 1024
	// hashers is how many executables are read at a time: starting large programs must not take all of the host's CPU.
	hashers = 2
)

// hasher computes digests of executables and remembers them for as long as the file does not change.
type hasher struct {
	slots chan struct{}
	known bounded[fileKey, string]
}

func newHasher() hasher {
	return hasher{make(chan struct{}, hashers), newBounded[fileKey, string](maxHashes)}
}

// fileKey is one content of one file. ctime moves with every write and cannot be set back by the file's owner.
type fileKey struct {
	dev, ino     uint64
	size         int64
	mtime, ctime unix.Timespec
}

func fileKeyOf(f *os.File) (fileKey, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return fileKey{}, err
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil {
		return fileKey{}, err
	}
	if fs.Type == unix.FUSE_SUPER_MAGIC {
		return fileKey{}, errors.New("it lies on FUSE, whose owner may show each reader another content")
	}
	if st.Size > maxExecutable {
		return fileKey{}, fmt.Errorf("it has %d bytes, more than the %d that are hashed", st.Size, maxExecutable)
	}
	return fileKey{st.Dev, st.Ino, st.Size, st.Mtim, st.Ctim}, nil
}

// sum is the hex SHA-256 of the file.
func (h *hasher) sum(ctx context.Context, file string) (string, error) {
	f, err := os.Open(file)
	if err != nil {
		return "", fmt.Errorf("hash the executable: %w", err)
	}
	defer f.Close()
	before, err := fileKeyOf(f)
	if err != nil {
		return "", fmt.Errorf("hash %s: %w", file, err)
	}
	if sum, ok := h.known.get(before); ok {
		return sum, nil
	}
	select {
	case h.slots <- struct{}{}:
		defer func() { <-h.slots }()
	case <-ctx.Done():
		return "", fmt.Errorf("hash %s: wait for others: %w", file, context.Cause(ctx))
	}
	digest := sha256.New()
	if _, err = io.Copy(digest, reader{ctx, io.LimitReader(f, maxExecutable+1)}); err != nil {
		return "", fmt.Errorf("hash %s: %w", file, err)
	}
	after, err := fileKeyOf(f)
	if err != nil {
		return "", fmt.Errorf("hash %s: %w", file, err)
	}
	if before != after {
		return "", fmt.Errorf("%w: %s was written to while it was read", ErrChanged, file)
	}
	sum := hex.EncodeToString(digest.Sum(nil))
	// A second write within one tick of the kernel's clock leaves ctime as it is.
	if time.Since(time.Unix(before.ctime.Unix())) > time.Second {
		h.known.put(before, sum)
	}
	return sum, nil
}

// reader ends with its context.
type reader struct {
	ctx context.Context
	io.Reader
}

func (r reader) Read(b []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.Reader.Read(b)
}
