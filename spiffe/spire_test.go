package spiffe_test

import (
	"flag"
	"os"
	"testing"

	"klamm/spiffe"
	"klamm/test/spire/cases"
	"klamm/test/spire/fake"
)

func TestMain(m *testing.M) {
	cases.Probe()
	if err := flag.Set("test.parallel", "16"); err != nil { // they mostly wait
		panic(err)
	}
	os.Exit(m.Run())
}

// The same cases are run on a real SPIRE by make verify-identity.
func TestSPIRE(t *testing.T) {
	for name, world := range map[string]struct {
		options fake.Options
		apis    []string
	}{
		"as SPIRE does":            {fake.Options{}, spiffe.APIs},
		"as the specification has": {fake.Options{Conforms: true}, []string{spiffe.APIBroker}},
	} {
		for _, api := range world.apis {
			for _, c := range cases.All {
				t.Run(name+"/"+api+"/"+c.Name, func(t *testing.T) {
					t.Parallel()
					run(t, c, world.options, api)
				})
			}
		}
	}
}

func run(t *testing.T, c cases.Case, o fake.Options, api string) {
	t.Helper()
	agent, err := fake.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := agent.Stop(); err != nil {
			t.Error(err)
		}
	})
	if err := c.On(t.Context(), agent, api); err != nil {
		t.Error(err)
	}
}

func TestABrokerAPIThatIsNoAgentsIsNotAsked(t *testing.T) {
	t.Parallel()
	run(t, cases.Impostor, fake.Options{Impostor: "spiffe://example.test/orders"}, spiffe.APIBroker)
	run(t, cases.Impostor, fake.Options{Impostor: "spiffe://example.test/spire/server"}, spiffe.APIBroker)
}

func TestAnAnswerLargerThanTheBoundIsNotTaken(t *testing.T) {
	t.Parallel()
	for _, api := range spiffe.APIs {
		run(t, cases.Flood, fake.Options{}, api)
	}
}
