package oidc

import "testing"

func TestTokensOfARealIssuer(t *testing.T) {
	p, err := Start(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := p.Stop(); err != nil {
			t.Error(err)
		}
	}()
	for _, c := range Checks() {
		t.Run(c.Name, func(t *testing.T) {
			measured, err := c.Run(t.Context(), p)
			if err != nil {
				t.Fatal(err)
			}
			t.Log(measured)
		})
	}
}
