package sasl

import (
	"encoding/json"
	"strings"
)

// mskIAM reads the one message of AWS_MSK_IAM, version 2020_10_22: a JSON object whose credential is "access key
// id/date/region/kafka-cluster/aws4_request". The role behind the key is known to AWS alone.
func mskIAM(msg []byte) (Claim, error) {
	var payload struct {
		Credential string `json:"x-amz-credential"`
	}
	if json.Unmarshal(msg, &payload) != nil {
		return Claim{}, ErrMalformed
	}
	scope := strings.Split(payload.Credential, "/")
	if len(scope) != 5 || scope[0] == "" || scope[3] != "kafka-cluster" || scope[4] != "aws4_request" {
		return Claim{}, ErrMalformed
	}
	return Claim{AccessKeyID: scope[0], Region: scope[2]}, nil
}
