package kubernetes

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Image is a container image of one layer, made of files of this host.
type Image struct {
	Name    string
	Command []string
	Files   map[string]string // path in the image -> file on the host
	Links   map[string]string // path in the image -> target of the symbolic link
}

// AddProgram adds an installed program with the shared libraries it is linked to, which ldd(1) tells.
func (i *Image) AddProgram(name string) error {
	path, err := exec.LookPath(name)
	if err != nil {
		return err
	}
	i.Files[filepath.Join("bin", name)] = path
	out, err := exec.Command("ldd", path).CombinedOutput()
	if bytes.Contains(out, []byte("not a dynamic executable")) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("ldd %s: %w\n%s", path, err, out)
	}
	for line := range strings.Lines(string(out)) {
		// "libz.so.1 => /lib/x86_64-linux-gnu/libz.so.1 (0x…)" or "/lib64/ld-linux-x86-64.so.2 (0x…)"
		for _, word := range strings.Fields(line) {
			if filepath.IsAbs(word) {
				i.Files[word[1:]] = word
			}
		}
	}
	return nil
}

// archive writes what docker save would: https://github.com/moby/docker-image-spec, v1.2.
func (i *Image) archive(file string) error {
	layer, err := i.layer()
	if err != nil {
		return fmt.Errorf("make the image %s: %w", i.Name, err)
	}
	config := map[string]any{
		"architecture": "amd64", "os": "linux",
		"config": map[string]any{"Env": []string{"PATH=/bin"}, "Cmd": i.Command},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{fmt.Sprintf("sha256:%x", sha256.Sum256(layer))}},
	}
	manifest := []map[string]any{{"Config": "config.json", "RepoTags": []string{i.Name}, "Layers": []string{"layer.tar"}}}
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for name, content := range map[string]any{"manifest.json": manifest, "config.json": config} {
		text, err := json.Marshal(content)
		if err != nil {
			return err
		}
		if err := writeFile(w, name, text); err != nil {
			return err
		}
	}
	if err := errors.Join(writeFile(w, "layer.tar", layer), w.Close()); err != nil {
		return err
	}
	return os.WriteFile(file, out.Bytes(), 0o644)
}

func (i *Image) layer() ([]byte, error) {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for name, from := range i.Files {
		content, err := os.ReadFile(from)
		if err != nil {
			return nil, err
		}
		if err := writeFile(w, name, content); err != nil {
			return nil, err
		}
	}
	for name, to := range i.Links {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: to, Mode: 0o777}); err != nil {
			return nil, err
		}
	}
	err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: "tmp/", Mode: 0o1777})
	return out.Bytes(), errors.Join(err, w.Close())
}

func writeFile(w *tar.Writer, name string, content []byte) error {
	if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o755, Size: int64(len(content))}); err != nil {
		return err
	}
	_, err := io.Copy(w, bytes.NewReader(content))
	return err
}

// Images that every node has, as pods name them.
const (
	pauseImage  = "klamm.test/pause:1"
	ClientImage = "klamm.test/client:1" // busybox, kcat and a franz-go client, as anyone would build it
)

// makeImages writes the archives of the images below dir.
func makeImages(ctx context.Context, dir string, more []*Image) error {
	for _, source := range []string{"test/kubernetes/pause", "test/clients/franz-go"} {
		if err := Build(ctx, source, filepath.Join(dir, filepath.Base(source))); err != nil {
			return err
		}
	}
	pause := &Image{
		Name: pauseImage, Command: []string{"/pause"}, Files: map[string]string{"pause": filepath.Join(dir, "pause")},
	}
	client, err := ShellImage(ClientImage, "kcat")
	if err != nil {
		return err
	}
	client.Files["bin/franz-go"] = filepath.Join(dir, "franz-go")
	for i, image := range append([]*Image{pause, client}, more...) {
		if err := image.archive(filepath.Join(dir, fmt.Sprintf("image-%d.tar", i))); err != nil {
			return err
		}
	}
	return nil
}

// ShellImage has busybox, and a program of this host.
func ShellImage(name, program string) (*Image, error) {
	i := &Image{Name: name, Command: []string{"/bin/sh"}, Files: map[string]string{}, Links: map[string]string{}}
	for _, name := range []string{"busybox", program} {
		if err := i.AddProgram(name); err != nil {
			return nil, err
		}
	}
	applets, err := exec.Command("busybox", "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("list the applets of busybox: %w", err)
	}
	for applet := range strings.FieldsSeq(string(applets)) {
		if applet != "busybox" {
			i.Links["bin/"+applet] = "busybox"
		}
	}
	return i, nil
}

// Build builds a static binary.
func Build(ctx context.Context, dir, to string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-C", dir, "-o", to, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%v: %w\n%s", cmd.Args, err, out)
	}
	return nil
}
